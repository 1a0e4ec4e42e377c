// Where the channels that a node reads lie. ShuffleNetV2 takes channels by turns from two branches, unit after unit, and each
// channel is read once: so nothing need be moved. What reads such a value takes its channels from the values that they were
// made in, and the weight's columns are packed in that order.
#include <algorithm>
#include <numeric>
#include <utility>

#include "../ops/calls.h"
#include "program.h"

namespace fastblocks {
namespace train {

namespace {

typedef std::pair<int64_t, int64_t> Channel;  // value, channel

bool may_gather(const Node& node) {
  return (node.kind == Kind::kPointwise && node.groups == 1) || node.kind == Kind::kInterleave;
}

Route route_of(const std::vector<Channel>& channels) {
  Route route;
  std::vector<int64_t> order(channels.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return channels[a] < channels[b]; });
  for (int64_t i : order) {
    const auto [value, channel] = channels[i];
    Piece* last = route.pieces.empty() ? nullptr : &route.pieces.back();
    if (last && last->value == value && last->first + last->channels == channel)
      ++last->channels;
    else
      route.pieces.push_back({value, channel, 1});
  }
  route.order = std::move(order);
  return route;
}

}  // namespace

void Bound::find_routes() {
  const std::vector<Node>& nodes = program->nodes;
  // How often each channel of a value is read by nodes that can gather, and whether others read it.
  std::vector<std::vector<int>> reads;
  for (const Shape& s : shapes) reads.emplace_back(s.c, 0);
  read_once.assign(shapes.size(), true);
  for (const Node& n : nodes) {
    const int64_t first = n.first, end = n.channels < 0 ? shapes[n.input].c : n.first + n.channels;
    for (int64_t c = first; c < end; ++c) ++reads[n.input][c];
    if (!may_gather(n)) read_once[n.input] = false;
    if (n.other > 0 && n.kind == Kind::kInterleave)
      for (int& count : reads[n.other]) ++count;
    else if (n.other > 0)
      read_once[n.other] = false;
  }
  for (size_t v = 0; v < shapes.size(); ++v)
    for (int count : reads[v])
      if (count != 1) read_once[v] = false;
  stored.assign(shapes.size(), true);
  routes.resize(nodes.size());
  std::vector<std::vector<Channel>> maps(shapes.size());  // of values that are not stored
  const auto append = [&](std::vector<Channel>& to, int64_t value, int64_t c) {
    to.push_back(stored[value] ? Channel{value, c} : maps[value][c]);
  };
  for (size_t i = 0; i < nodes.size(); ++i) {
    const Node& n = nodes[i];
    if (n.kind != Kind::kPointwise && n.kind != Kind::kInterleave) continue;
    const int64_t channels = n.channels < 0 ? shapes[n.input].c : n.channels;
    std::vector<Channel> map;
    for (int64_t c = 0; c < channels; ++c) {
      append(map, n.input, n.first + c);
      if (n.kind == Kind::kInterleave) append(map, n.other, c);
    }
    if (n.kind == Kind::kInterleave) {
      require(read_once[n.input] && read_once[n.other], "fastblocks._C: an interleaving's inputs are read once");
      if (i + 1 < nodes.size() && read_once[i + 1]) {
        stored[i + 1] = false;
        maps[i + 1] = std::move(map);
        continue;
      }
    }
    routes[i] = route_of(map);
  }
}

// Of a 1x1 convolution's output that more than one node reads. A plane of less than a cache line takes its neighbour along.
void Bound::find_planes() {
  planes.resize(shapes.size());
  for (const Route& route : routes)
    for (const Piece& piece : route.pieces) {
      const Node* node = maker(piece.value);
      if (node && node->kind == Kind::kPointwise && read_once[piece.value] && piece.channels < shapes[piece.value].c)
        planes[piece.value].push_back({piece.first, piece.channels});
    }
  for (std::vector<Plane>& of : planes) {
    std::sort(of.begin(), of.end(), [](const Plane& a, const Plane& b) { return a.first < b.first; });
    size_t count = 0;
    for (const Plane& plane : of)
      if (count && (of[count - 1].channels < kPadding || plane.channels < kPadding))
        of[count - 1].channels += plane.channels;
      else
        of[count++] = plane;
    of.resize(count < 2 ? 0 : count);
  }
}

}  // namespace train
}  // namespace fastblocks
