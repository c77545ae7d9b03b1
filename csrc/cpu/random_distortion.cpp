// Random shifts, rotations, changes of scale, shears, elastic distortions, crops and mirror images.
//
//   (seed, epoch, position) -> Philox -> a map of the pixels of the output to places in the image
//   elastic   words (h, w) -> two fields of numbers -> smoothed down the columns -> along the rows -> displacements
//   sample    plane (H, W) -> with a border of zeros -> four neighbours of each place -> output (h, w)
//   copy      plane (H, W) -> rows of the crop, backwards in a mirror image -> output (h, w)
//
// An image is one task, whose arithmetic does not depend on the others.
#include "isa_kernels.h"
#include "parallel.h"
#include "philox_simd.h"
#include "simd.h"
#include "storage_simd.h"

namespace pyconv::cpu {
namespace {

// ---- Random numbers ---------------------------------------------------------------------------------------------

// The blocks of an image. Words of kMapBlock: shift down, shift to the right, rotation, shear; of kScaleBlock: scale of
// height, scale of width, mirror image; of kCropBlock: row, column. From kFieldBlock on a word for each pixel of the
// output, row by row: its low half is the displacement down, its high half that to the right, before smoothing.
enum : uint64_t { kMapBlock, kScaleBlock, kCropBlock, kFieldBlock };

// A number between -1 and 1, neither of which it is.
inline double symmetric(uint32_t word) { return (static_cast<int32_t>(word) + 0.5) * 0x1p-31; }
constexpr double kHalvesScale = 0x1p-15;  // the same for fill_signed_halves()

// One of 0 ... count - 1.
inline int64_t whole_number(uint32_t word, int64_t count) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(count)) >> 32);
}

// A pixel (r, c) of the output shows the place
//   (place_h + r * rows_h + c * columns_h, place_w + r * rows_w + c * columns_w)
// of the image, displacements apart. Without interpolation it is pixel (top + r, left + c), and in a mirror image c counts
// from the right.
struct Map {
  double place_h, place_w, rows_h, rows_w, columns_h, columns_w;
  int64_t top, left;
  bool mirrored;
};

inline Map map_of(const RandomDistortionParams& p, int64_t image) {
  const auto block = [&](uint64_t index) {
    const auto position = static_cast<uint64_t>(p.positions[image]);
    return philox_block(p.seed, position, static_cast<uint64_t>(p.epoch) << 32 | index);
  };
  Map map{};
  if (p.crops()) {
    const PhiloxBlock draws = block(kCropBlock);
    map.top = whole_number(draws.word[0], p.H + 2 * p.padding - p.output_h + 1);
    map.left = whole_number(draws.word[1], p.W + 2 * p.padding - p.output_w + 1);
  }
  map.top -= p.padding;
  map.left -= p.padding;
  PhiloxBlock scales{};
  if (p.flip != 0 || p.scale != 0) scales = block(kScaleBlock);
  map.mirrored = scales.word[2] < static_cast<uint64_t>(p.flip * 4294967296.0 + 0.5);
  if (!p.interpolates()) return map;

  PhiloxBlock draws{};
  if (p.is_affine()) draws = block(kMapBlock);
  const double angle = p.rotation * symmetric(draws.word[2]), shear = p.shear * symmetric(draws.word[3]);
  const double scale_h = 1 + p.scale * symmetric(scales.word[0]), scale_w = 1 + p.scale * symmetric(scales.word[1]);
  const double sine = ::sin(angle), cosine = ::cos(angle);
  // The image is scaled, then sheared, then turned; this is the way back.
  const double h_by_h = cosine / scale_h, h_by_w = sine / scale_h;
  const double w_by_h = -(sine + shear * cosine) / scale_w, w_by_w = (cosine - shear * sine) / scale_w;
  const double middle_h = 0.5 * static_cast<double>(p.H - 1), middle_w = 0.5 * static_cast<double>(p.W - 1);
  const double first_h = static_cast<double>(map.top) - middle_h - p.shift_h * symmetric(draws.word[0]);
  const double first_w = static_cast<double>(map.mirrored ? map.left + p.output_w - 1 : map.left) - middle_w -
                         p.shift_w * symmetric(draws.word[1]);
  const double direction = map.mirrored ? -1 : 1;
  map.place_h = middle_h + h_by_h * first_h + h_by_w * first_w;
  map.place_w = middle_w + w_by_h * first_h + w_by_w * first_w;
  map.rows_h = h_by_h;
  map.rows_w = w_by_h;
  map.columns_h = h_by_w * direction;
  map.columns_w = w_by_w * direction;
  return map;
}

// ---- Memory of a worker -----------------------------------------------------------------------------------------

constexpr int64_t kTileRows = 4;  // of smoothed numbers in registers: by kTileVectors vectors
constexpr int64_t kTileVectors = 2;
template <class A>
constexpr int64_t kTileColumns = kTileVectors * kWidth<A>;

constexpr int64_t kBorder = 1;  // zeros before a plane; and one more behind it

inline int64_t bordered(int64_t extent) { return extent + 2 * kBorder + 1; }

// What a worker needs; each part is aligned to 64 bytes. Without memory its bytes are counted only.
template <class A>
struct Scratch {
  Scratch(const RandomDistortionParams& p, char* memory) : memory_(memory) {
    plane_size = p.interpolates() ? bordered(p.H) * bordered(p.W) : 0;
    plane = take<A>(plane_size);
    if (p.elastic == 0) return;
    columns = round_up(p.output_w, kTileColumns<A>);
    rows = round_up(p.output_h, kTileRows);
    // A tile that begins in the last row reads beyond its end.
    field_size = p.output_h * p.output_w + max_of(kSignedHalvesSlack, kTileColumns<A>);
    draws = take<float>(2 * field_size);
    if (sizeof(A) != sizeof(float)) fields = take<A>(2 * field_size);
    smoothed_down = take<A>(2 * rows * columns);
    displacements = take<A>(2 * rows * columns);
    taps_size = 2 * (p.radius + kTapBorder) + 1;
    taps = take<A>(taps_size);
  }

  static constexpr int64_t kTapBorder = kTileColumns<A> + kTileRows;

  // To be called once before the first image.
  void prepare(const RandomDistortionParams& p) const {
    for (int64_t i = 0; i < plane_size; ++i) plane[i] = 0;
    if (p.elastic == 0) return;
    for (int64_t i = 0; i < 2 * field_size; ++i) draws[i] = 0;
    for (int64_t i = 0; i < taps_size; ++i) taps[i] = 0;
    A* middle = middle_tap(p);
    for (int64_t i = 0; i <= p.radius; ++i) middle[i] = middle[-i] = static_cast<A>(p.smoothing[i]);
  }

  A* middle_tap(const RandomDistortionParams& p) const { return taps + p.radius + kTapBorder; }

  int64_t plane_size = 0, field_size = 0, taps_size = 0;
  int64_t rows = 0, columns = 0;  // of the output, rounded up
  A* plane = nullptr;             // (H + 3, W + 3): with zeros around it
  float* draws = nullptr;         // (2, field_size): down and to the right, row by row
  A* fields = nullptr;            // the same as A; null where that is float
  A* smoothed_down = nullptr;     // (2, rows, columns)
  A* displacements = nullptr;     // (2, rows, columns)
  A* taps = nullptr;              // of the Gaussian from left to right, between zeros
  int64_t bytes = 0;

 private:
  template <class Element>
  Element* take(int64_t count) {
    char* taken = memory_ == nullptr ? nullptr : memory_ + bytes;
    bytes += round_up(count * static_cast<int64_t>(sizeof(Element)), 64);
    return reinterpret_cast<Element*>(taken);
  }

  char* memory_;
};

template <class A>
int64_t workspace_bytes_of_worker(const RandomDistortionParams& p) {
  // A copy within the same memory goes over a plane of it.
  const int64_t plane = p.images == p.output ? round_up(p.H * p.W * static_cast<int64_t>(sizeof(A)), 64) : 0;
  return max_of(Scratch<A>(p, nullptr).bytes, plane);
}

// ---- Elastic displacements --------------------------------------------------------------------------------------

// to[r][c] = sum over j of left[r * left_row + j * left_step] * right[j * right_step + c] for a tile of r and c.
template <class A>
inline void multiply_tile(const A* left, int64_t left_row, int64_t left_step, const A* right, int64_t right_step,
                          int64_t begin, int64_t end, A factor, A* to, int64_t to_row) {
  Vec<A> sums[kTileRows][kTileVectors];
  for (auto& row : sums) {
    for (auto& sum : row) sum = zero<A>();
  }
  for (int64_t j = begin; j < end; ++j) {
    Vec<A> vectors[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) vectors[v] = load(right + j * right_step + v * kWidth<A>);
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<A> number = broadcast(left[r * left_row + j * left_step]);
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = fma(number, vectors[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      store(to + r * to_row + v * kWidth<A>, mul(sums[r][v], broadcast(factor)));
    }
  }
}

// The smoothed displacements of an image. Both directions are products with a band matrix of the taps: nothing counts
// outside the image.
template <class A>
void displace(const RandomDistortionParams& p, int64_t image, const Scratch<A>& scratch) {
  fill_signed_halves(p.seed, static_cast<uint64_t>(p.positions[image]),
                     static_cast<uint64_t>(p.epoch) << 32 | kFieldBlock, p.output_h * p.output_w, scratch.draws,
                     scratch.draws + scratch.field_size);
  const A* fields = scratch.fields;
  if constexpr (sizeof(A) == sizeof(float)) {
    fields = scratch.draws;
  } else {
    for (int64_t i = 0; i < 2 * scratch.field_size; ++i) scratch.fields[i] = scratch.draws[i];
  }
  const A* middle = scratch.middle_tap(p);
  const int64_t rows = scratch.rows, columns = scratch.columns;
  for (int field = 0; field < 2; ++field) {
    const A* from = fields + field * scratch.field_size;
    A* to = scratch.smoothed_down + field * rows * columns;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t begin = max_of(0, r - p.radius), end = min_of(p.output_h, r + kTileRows + p.radius);
      for (int64_t c = 0; c < columns; c += kTileColumns<A>) {
        // Columns beyond the last hold what nobody reads.
        multiply_tile(middle + r, 1, -1, from + c, p.output_w, begin, end, A(1), to + r * columns + c, columns);
      }
    }
  }
  const A factor = static_cast<A>(p.elastic * kHalvesScale);
  for (int64_t c = 0; c < columns; c += kTileColumns<A>) {
    const int64_t begin = max_of(0, c - p.radius), end = min_of(p.output_w, c + kTileColumns<A> + p.radius);
    for (int64_t r = 0; r < 2 * rows; r += kTileRows) {
      multiply_tile(scratch.smoothed_down + r * columns, columns, 1, middle + c, -1, begin, end, factor,
                    scratch.displacements + r * columns + c, columns);
    }
  }
}

// ---- Sampling ---------------------------------------------------------------------------------------------------

// x within [0, most]; 0 for NaN.
template <class A>
inline Vec<A> clamped(Vec<A> x, A most) {
  const Vec<A> not_negative = larger_of(x, zero<A>()), limit = broadcast(most);
  return select(greater(not_negative, limit), limit, not_negative);
}

// a + (b - a) * t
template <class A>
inline Vec<A> between(Vec<A> a, Vec<A> b, Vec<A> t) {
  return fma(sub(b, a), t, a);
}

template <class T, class A>
void sample_plane(const RandomDistortionParams& p, const Map& map, const Scratch<A>& scratch, T* output) {
  const auto stride = static_cast<int32_t>(bordered(p.W));
  const A last_h = static_cast<A>(p.H + kBorder), last_w = static_cast<A>(p.W + kBorder);
  const Vec<A> columns_h = broadcast(static_cast<A>(map.columns_h));
  const Vec<A> columns_w = broadcast(static_cast<A>(map.columns_w));
  A lane_numbers[kWidth<A>];
  for (int i = 0; i < kWidth<A>; ++i) lane_numbers[i] = static_cast<A>(i);
  const Vec<A> lanes = load(lane_numbers);
  for (int64_t r = 0; r < p.output_h; ++r) {
    const auto row = static_cast<double>(r);
    const Vec<A> row_h = broadcast(static_cast<A>(kBorder + map.place_h + row * map.rows_h));
    const Vec<A> row_w = broadcast(static_cast<A>(kBorder + map.place_w + row * map.rows_w));
    for (int64_t c = 0; c < p.output_w; c += kWidth<A>) {
      const Vec<A> column = add(lanes, broadcast(static_cast<A>(c)));
      Vec<A> h = fma(column, columns_h, row_h), w = fma(column, columns_w, row_w);
      if (p.elastic != 0) {
        const A* displacement = scratch.displacements + r * scratch.columns + c;
        h = add(h, load(displacement));
        w = add(w, load(displacement + scratch.rows * scratch.columns));
      }
      // What lies beyond the border of zeros is 0, as the border is.
      h = clamped(h, last_h);
      w = clamped(w, last_w);
      const Vec<A> above = truncated(h), left = truncated(w);
      alignas(64) int32_t indices[kWidth<A>];
      store_indices(indices, above, left, stride);
      Vec<A> above_left, above_right, below_left, below_right;
      gather_pairs(scratch.plane, indices, above_left, above_right);
      gather_pairs(scratch.plane + stride, indices, below_left, below_right);
      const Vec<A> to_right = sub(w, left);
      const Vec<A> value = between(between(above_left, above_right, to_right),
                                   between(below_left, below_right, to_right), sub(h, above));
      store_narrowed(output + r * p.output_w + c, value, min_of(kWidth<A>, p.output_w - c));
    }
  }
}

template <class T>
void sample_image(const RandomDistortionParams& p, int64_t image, const Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  const Map map = map_of(p, image);
  if (p.elastic != 0) displace(p, image, scratch);
  for (int64_t channel = image * p.C; channel < (image + 1) * p.C; ++channel) {
    const T* from = static_cast<const T*>(p.images) + channel * p.H * p.W;
    for (int64_t r = 0; r < p.H; ++r) {
      A* to = scratch.plane + (r + kBorder) * bordered(p.W) + kBorder;
      for (int64_t c = 0; c < p.W; c += kWidth<A>) {
        const int64_t count = min_of(kWidth<A>, p.W - c);
        store_narrowed(to + c, load_widened(from + r * p.W + c, count), count);
      }
    }
    sample_plane(p, map, scratch, static_cast<T*>(p.output) + channel * p.output_h * p.output_w);
  }
}

// ---- Copies -----------------------------------------------------------------------------------------------------

template <class T>
void copy_plane(const RandomDistortionParams& p, const Map& map, const T* from, T* to) {
  // The columns of the crop, seen from its left side, that the image has.
  const int64_t begin = min_of(max_of(-map.left, 0), p.output_w);
  const int64_t end = max_of(min_of(p.W - map.left, p.output_w), begin);
  const auto bytes = [](int64_t count) { return static_cast<size_t>(count) * sizeof(T); };
  for (int64_t r = 0; r < p.output_h; ++r) {
    T* row = to + r * p.output_w;
    const int64_t from_row = map.top + r;
    if (from_row < 0 || from_row >= p.H) {
      std::memset(row, 0, bytes(p.output_w));
      continue;
    }
    const T* pixels = from + from_row * p.W + map.left;
    if (map.mirrored) {
      std::memset(row, 0, bytes(p.output_w - end));
      for (int64_t c = begin; c < end; ++c) row[p.output_w - 1 - c] = pixels[c];
      std::memset(row + p.output_w - begin, 0, bytes(begin));
    } else {
      std::memset(row, 0, bytes(begin));
      std::memcpy(row + begin, pixels + begin, bytes(end - begin));
      std::memset(row + end, 0, bytes(p.output_w - end));
    }
  }
}

template <class T>
void copy_image(const RandomDistortionParams& p, int64_t image, void* memory) {
  const Map map = map_of(p, image);
  const bool in_place = p.images == p.output;
  if (in_place && map.top == 0 && map.left == 0 && !map.mirrored) return;
  for (int64_t channel = image * p.C; channel < (image + 1) * p.C; ++channel) {
    const T* from = static_cast<const T*>(p.images) + channel * p.H * p.W;
    if (in_place) {
      std::memcpy(memory, from, static_cast<size_t>(p.H * p.W) * sizeof(T));
      from = static_cast<const T*>(memory);
    }
    copy_plane(p, map, from, static_cast<T*>(p.output) + channel * p.output_h * p.output_w);
  }
}

// ---- All images -------------------------------------------------------------------------------------------------

template <class T>
void distort(const RandomDistortionParams& p) {
  using A = Accumulator<T>;
  const int64_t workers = min_of(p.threads.num_threads, p.N), bytes = workspace_bytes_of_worker<A>(p);
  parallel(p.threads, workers, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      char* memory = static_cast<char*>(p.workspace) + worker * bytes;
      const Scratch<A> scratch(p, memory);
      scratch.prepare(p);
      for (int64_t image = p.N * worker / workers; image < p.N * (worker + 1) / workers; ++image) {
        if (p.interpolates()) {
          sample_image<T>(p, image, scratch);
        } else {
          copy_image<T>(p, image, memory);
        }
      }
    }
  });
}

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

int64_t random_distortion_workspace_bytes(const RandomDistortionParams& params) {
  const int64_t bytes = params.dtype == DType::float64 ? workspace_bytes_of_worker<double>(params)
                                                        : workspace_bytes_of_worker<float>(params);
  return bytes * min_of(params.threads.num_threads, params.N);
}

void random_distortion(const RandomDistortionParams& params) {
  with_storage_type(params.dtype, [&](auto type) { distort<decltype(type)>(params); });
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
