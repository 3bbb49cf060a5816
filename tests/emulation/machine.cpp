#include "backend/cuda/machine.cuh"

#include <ucontext.h>

#include <map>
#include <random>

namespace larosa::emulation {
namespace {

constexpr size_t kStack = 24 << 10;
constexpr size_t kGuard = 64;  // bytes behind a block's shared memory that nobody may write
constexpr char kUnset = '\xee';

struct Warp {
  int came = 0, turn = 0;
  uint64_t brought[kWarp] = {}, all[kWarp] = {};
};
struct Barrier {
  int came = 0, turn = 0;
};
struct Block {
  uint3 index{};
  Block* cluster = nullptr;  // its first block
  Barrier left;              // of the cluster, in that one
  int threads = 0, came = 0, turn = 0;
  std::vector<uint4> memory;
  std::map<const void*, std::vector<uint4>> objects;
  std::vector<Warp> warps;
};
struct Thread {
  ucontext_t context{};
  uint3 index{};
  Block* block = nullptr;
  const int* waits = nullptr;  // until it is not `value` any more
  int value = 0;
  int cluster_turn = 0;  // that it came to
  bool done = false;
};

Thread* current = nullptr;
ucontext_t scheduler;
dim3 grid;
unsigned cluster_size;
const std::function<void()>* running = nullptr;
std::minstd_rand random_turns(1);
/// A block rests for some turns now and then, and behind barriers of its cluster, so that others get far
/// ahead of it.
const Block* resting = nullptr;

std::vector<uint4> unset(size_t bytes) {
  std::vector<uint4> memory(bytes / sizeof(uint4) + 1);
  std::memset(memory.data(), kUnset, memory.size() * sizeof(uint4));
  return memory;
}

void wait_while(const int& turn, int value) {
  while (turn == value) {
    current->waits = &turn;
    current->value = value;
    yield();
  }
  current->waits = nullptr;
}

void start() {
  (*running)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

/// Lets the lanes of a warp run as far as they get; true when one of them moved.
bool advance(Thread* lanes, size_t& left) {
  bool moved = false;
  for (int l = 0; l < kWarp; ++l) {
    Thread& thread = lanes[l];
    if (thread.done || (thread.waits && *thread.waits == thread.value)) continue;
    moved = true;
    current = &thread;
    swapcontext(&scheduler, &thread.context);
    left -= static_cast<size_t>(thread.done);
  }
  return moved;
}

}  // namespace

const uint3& thread_index() {
  return current->index;
}
const uint3& block_index() {
  return current->block->index;
}
const dim3& grid_size() {
  return grid;
}

void give_up(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

void yield() {
  swapcontext(&current->context, &scheduler);
}

void barrier() {
  Block& block = *current->block;
  const int turn = block.turn;
  if (++block.came < block.threads) return wait_while(block.turn, turn);
  block.came = 0;
  ++block.turn;
}

void arrive_at_cluster() {
  Block& first = *current->block->cluster;
  current->cluster_turn = first.left.turn;
  if (++first.left.came < first.threads * static_cast<int>(cluster_size)) return;
  first.left.came = 0;
  ++first.left.turn;
  if (random_turns() % 2 == 0) resting = &first + random_turns() % cluster_size;
}
void wait_for_cluster() {
  wait_while(current->block->cluster->left.turn, current->cluster_turn);
}

const uint64_t* exchange(uint64_t mine) {
  Warp& warp = current->block->warps[current->index.x / kWarp];
  const int turn = warp.turn;
  warp.brought[lane()] = mine;
  if (++warp.came < kWarp) {
    wait_while(warp.turn, turn);
  } else {
    warp.came = 0;
    std::copy(warp.brought, warp.brought + kWarp, warp.all);
    ++warp.turn;
  }
  return warp.all;
}

char* block_memory() {
  return reinterpret_cast<char*>(current->block->memory.data());
}
void* block_object(const void* key, size_t bytes) {
  std::vector<uint4>& object = current->block->objects[key];
  if (object.empty()) object = unset(bytes);
  return object.data();
}

void* in_block(const void* p, int rank) {
  Block &here = *current->block, &there = here.cluster[rank];
  const auto* const at = static_cast<const char*>(p);
  const auto offset = [&](const std::vector<uint4>& memory) {
    const char* const first = reinterpret_cast<const char*>(memory.data());
    return at >= first && at < first + memory.size() * sizeof(uint4) ? at - first : -1;
  };
  if (offset(here.memory) >= 0) return reinterpret_cast<char*>(there.memory.data()) + offset(here.memory);
  for (const auto& [key, object] : here.objects) {
    if (offset(object) < 0) continue;
    std::vector<uint4>& other = there.objects[key];
    if (other.empty()) other = unset((object.size() - 1) * sizeof(uint4));
    return reinterpret_cast<char*>(other.data()) + offset(object);
  }
  give_up("what another block has is asked for by an address that is not shared memory");
}

void run(dim3 size, unsigned cluster, int threads, int64_t shared, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  running = &kernel;
  grid = size;
  cluster_size = cluster;
  const int blocks = static_cast<int>(size.x * size.y);
  std::vector<Block> block(static_cast<size_t>(blocks));
  std::vector<Thread> thread(static_cast<size_t>(blocks) * static_cast<size_t>(threads));
  while (stacks.size() < thread.size()) stacks.push_back(std::make_unique<char[]>(kStack));
  for (size_t b = 0; b < block.size(); ++b) {
    block[b].index.x = static_cast<unsigned>(b) % size.x;
    block[b].index.y = static_cast<unsigned>(b) / size.x;
    block[b].cluster = &block[b / cluster * cluster];
    block[b].threads = threads;
    block[b].memory = unset(static_cast<size_t>(shared) + kGuard);
    block[b].warps.resize(static_cast<size_t>(threads / kWarp));
  }
  for (size_t t = 0; t < thread.size(); ++t) {
    thread[t].block = &block[t / static_cast<size_t>(threads)];
    thread[t].index.x = static_cast<unsigned>(t % static_cast<size_t>(threads));
    getcontext(&thread[t].context);
    thread[t].context.uc_stack.ss_sp = stacks[t].get();
    thread[t].context.uc_stack.ss_size = kStack;
    makecontext(&thread[t].context, start, 0);
  }
  std::vector<size_t> warps(thread.size() / kWarp);
  for (size_t w = 0; w < warps.size(); ++w) warps[w] = w;
  constexpr unsigned kRest = 40;
  resting = nullptr;
  unsigned turn = 0;
  for (size_t left = thread.size(); left > 0; ++turn) {
    if (turn % kRest == 0)
      resting = random_turns() % 2 == 0 ? &block[random_turns() % block.size()] : nullptr;
    std::shuffle(warps.begin(), warps.end(), random_turns);
    bool moved = false;
    for (const size_t w : warps) {
      if (thread[w * kWarp].block == resting) continue;
      for (unsigned ahead = random_turns() % 4 == 0 ? 8 : 1; ahead > 0 && advance(&thread[w * kWarp], left);
           --ahead)
        moved = true;
    }
    if (!moved && !resting) give_up("blocks or threads wait for each other");
    if (!moved) resting = nullptr;
  }
  for (const Block& b : block) {
    const char* const end = reinterpret_cast<const char*>(b.memory.data()) + shared;
    if (std::any_of(end, end + kGuard, [](char c) { return c != kUnset; }))
      give_up("a block wrote behind its shared memory");
  }
}

}  // namespace larosa::emulation
