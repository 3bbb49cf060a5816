// The seven projections of a layer and the four activation sites that feed them.
#pragma once

#include <array>
#include <string_view>

namespace larosa {

/// In the order of the arithmetic.
enum class Projection { wq, wk, wv, wo, gate, up, down };
inline constexpr std::array<Projection, 7> kProjections = {Projection::wq,  Projection::wk,   Projection::wv,
                                                           Projection::wo,  Projection::gate, Projection::up,
                                                           Projection::down};

/// h1: attention input after RMSNorm; h2: attention output; h3: MLP input after RMSNorm; h4: SiLU(gate)·up.
enum class Site { h1, h2, h3, h4 };
inline constexpr std::array<Site, 4> kSites = {Site::h1, Site::h2, Site::h3, Site::h4};

/// "wq", "wk", "wv", "wo", "gate", "up", "down": in code, files and docs.
constexpr const char* projection_name(Projection p) {
  constexpr const char* names[] = {"wq", "wk", "wv", "wo", "gate", "up", "down"};
  return names[static_cast<int>(p)];
}
/// "h1" … "h4".
constexpr const char* site_name(Site s) {
  constexpr const char* names[] = {"h1", "h2", "h3", "h4"};
  return names[static_cast<int>(s)];
}
/// The site that a projection reads.
constexpr Site site_of(Projection p) {
  switch (p) {
    case Projection::wq:
    case Projection::wk:
    case Projection::wv:
      return Site::h1;
    case Projection::wo:
      return Site::h2;
    case Projection::gate:
    case Projection::up:
      return Site::h3;
    case Projection::down:
      return Site::h4;
  }
  return Site::h4;
}

}  // namespace larosa
