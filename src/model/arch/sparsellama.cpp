// ProSparse (arXiv 2402.13516): Llama with hidden_act "fatrelu" and its threshold in hidden_act_param.
#include "model/arch/families.h"

namespace larosa {

const Architecture kSparseLlama = {"sparsellama", "SparseLlamaForCausalLM", read_llama, &kLlamaNames};

}  // namespace larosa
