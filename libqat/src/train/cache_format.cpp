#include "train/cache_format.hpp"

#include <ATen/ops/empty.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "qat/core/error.hpp"
#include "qat/grid/f16.hpp"
#include "train/checksum.hpp"

namespace qat::train {
namespace {

static_assert(std::endian::native == std::endian::little, "values are copied as they lie in memory");

constexpr char kMagic[8] = {'Q', 'A', 'T', 'T', 'C', 'H', '1', '\0'};

template <class Value>
Value load(const std::byte* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Value>
void store(std::byte* to, Value value) {
  std::memcpy(to, &value, sizeof value);
}

[[noreturn]] void fail(const std::string& path, const std::string& subject, const std::string& expected,
                       const std::string& got) {
  throw FileError("TeacherCache: " + path + ": " + subject + ": expected " + expected + ", got " + got);
}

/// Calls visit(name, word) for the six words after the magic.
template <class Visit>
void for_each_word(const CacheKey& key, Visit&& visit) {
  visit("teacher", key.teacher);
  visit("text", key.text);
  visit("vocabulary", static_cast<std::uint64_t>(key.vocabulary));
  visit("length", static_cast<std::uint64_t>(key.length));
  visit("top_k", static_cast<std::uint64_t>(key.top_k));
  visit("temperature", std::bit_cast<std::uint64_t>(key.temperature));
}

std::string in_words(const std::string& name, std::uint64_t word) {
  if (name == "temperature") return std::to_string(std::bit_cast<double>(word));
  return std::to_string(word);
}

void check_key(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  throw ArgumentError(std::string("TeacherCache: ") + name + ": expected " + std::to_string(least) + " to " +
                      std::to_string(most) + ", got " + std::to_string(value));
}

template <class Id>
void write_ids(const int64_t* ids, int64_t count, std::byte* to) {
  for (int64_t i = 0; i < count; ++i) store(to + i * sizeof(Id), static_cast<Id>(ids[i]));
}

/// False unless each row of k ascends and stays below the vocabulary.
template <class Id>
bool read_ids(const std::byte* from, int64_t rows, int64_t k, int64_t vocabulary, int64_t* ids) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t before = -1;
    for (int64_t i = 0; i < k; ++i, ++ids, from += sizeof(Id)) {
      *ids = load<Id>(from);
      if (*ids <= before || *ids >= vocabulary) return false;
      before = *ids;
    }
  }
  return true;
}

bool is_log_probability(float value) {
  return value <= 0;  // false for NaN
}

}  // namespace

CacheLayout::CacheLayout(const CacheKey& key)
    : positions(key.length - 1), top_k(key.top_k), vocabulary(key.vocabulary) {
  constexpr int64_t kMost = std::numeric_limits<std::uint32_t>::max();
  check_key("vocabulary", key.vocabulary, 2, kMost);
  check_key("length", key.length, 2, kMost);
  check_key("top_k", key.top_k, 1, key.vocabulary - 1);
  id_bytes = vocabulary <= 65536 ? 2 : 4;
  constexpr int64_t kMostOutcomes = int64_t{1} << 40;  // so that no size below overflows
  check_key("length * top_k", positions > kMostOutcomes / top_k ? kMostOutcomes + 1 : positions * top_k, 1,
            kMostOutcomes);
  const auto outcomes = static_cast<std::size_t>(positions * top_k);
  ids = sizeof(std::uint64_t);
  log_p = ids + outcomes * static_cast<std::size_t>(id_bytes);
  rest = log_p + outcomes * sizeof(std::uint16_t);
  const std::size_t end = rest + static_cast<std::size_t>(positions) * sizeof(float);
  checksum = (end + 7) / 8 * 8;
  bytes = checksum + sizeof(std::uint64_t);
}

std::array<std::byte, kCacheHeaderBytes> write_header(const CacheKey& key) {
  std::array<std::byte, kCacheHeaderBytes> header{};
  std::memcpy(header.data(), kMagic, sizeof kMagic);
  std::byte* to = header.data() + sizeof kMagic;
  for_each_word(key, [&](const char*, std::uint64_t word) {
    store(to, word);
    to += sizeof word;
  });
  store(to, checksum({header.data(), kCacheHeaderBytes - sizeof(std::uint64_t)}));
  return header;
}

void check_header(const std::string& path, std::span<const std::byte> file, const CacheKey& key) {
  if (file.size() < kCacheHeaderBytes || std::memcmp(file.data(), kMagic, sizeof kMagic) != 0) {
    fail(path, "header", "64 bytes that begin with QATTCH1",
         std::to_string(file.size()) + " bytes of another kind");
  }
  constexpr std::size_t kChecked = kCacheHeaderBytes - sizeof(std::uint64_t);
  if (load<std::uint64_t>(file.data() + kChecked) != checksum(file.first(kChecked))) {
    fail(path, "header", "its checksum", "damaged bytes");
  }
  const std::byte* from = file.data() + sizeof kMagic;
  for_each_word(key, [&](const std::string& name, std::uint64_t expected) {
    const auto got = load<std::uint64_t>(from);
    from += sizeof got;
    if (got != expected) {
      fail(path, "made for another " + name, in_words(name, expected),
           in_words(name, got) + ": choose another path, or remove the file");
    }
  });
}

std::vector<std::byte> write_record(const CacheLayout& layout, int64_t window, const WindowAnswer& answer) {
  std::vector<std::byte> record(layout.bytes);
  store(record.data(), static_cast<std::uint64_t>(window));
  const int64_t k = layout.top_k, outcomes = layout.positions * k;
  const auto* ids = answer.ids.const_data_ptr<int64_t>();
  if (layout.id_bytes == 2) {
    write_ids<std::uint16_t>(ids, outcomes, record.data() + layout.ids);
  } else {
    write_ids<std::uint32_t>(ids, outcomes, record.data() + layout.ids);
  }
  const auto* log_p = answer.log_p.const_data_ptr<float>();
  std::byte* to = record.data() + layout.log_p;
  for (int64_t n = 0; n < layout.positions; ++n, ++log_p) {
    for (int64_t i = 0; i < k; ++i, to += sizeof(std::uint16_t)) store(to, grid::f16_bits(*log_p++));
    store(record.data() + layout.rest + static_cast<std::size_t>(n) * sizeof(float), *log_p);
  }
  store(record.data() + layout.checksum, checksum({record.data(), layout.checksum}));
  return record;
}

bool read_record(const CacheLayout& layout, std::span<const std::byte> record, const WindowAnswer& answer) {
  const int64_t k = layout.top_k;
  auto* ids = answer.ids.mutable_data_ptr<int64_t>();
  const auto read = layout.id_bytes == 2 ? read_ids<std::uint16_t> : read_ids<std::uint32_t>;
  if (!read(record.data() + layout.ids, layout.positions, k, layout.vocabulary, ids)) return false;
  auto* log_p = answer.log_p.mutable_data_ptr<float>();
  const std::byte* from = record.data() + layout.log_p;
  bool legal = true;
  for (int64_t n = 0; n < layout.positions; ++n) {
    for (int64_t i = 0; i < k; ++i, from += sizeof(std::uint16_t)) {
      *log_p = grid::f16_value(load<std::uint16_t>(from));
      legal = legal && is_log_probability(*log_p++);
    }
    *log_p = load<float>(record.data() + layout.rest + static_cast<std::size_t>(n) * sizeof(float));
    legal = legal && is_log_probability(*log_p++);
  }
  return legal;
}

bool record_is_whole(const CacheLayout& layout, std::span<const std::byte> record) {
  return load<std::uint64_t>(record.data() + layout.checksum) == checksum(record.first(layout.checksum));
}

std::span<const std::byte> cache_slot(const CacheLayout& layout, std::span<const std::byte> file,
                                      int64_t slot) {
  return file.subspan(kCacheHeaderBytes + static_cast<std::size_t>(slot) * layout.bytes, layout.bytes);
}

CacheIndex index_cache(const CacheLayout& layout, std::span<const std::byte> file, bool verify) {
  CacheIndex index;
  const std::size_t body = file.size() - kCacheHeaderBytes;
  index.whole = static_cast<int64_t>(body / layout.bytes);
  index.torn = body % layout.bytes;
  for (int64_t slot = 0; slot < index.whole; ++slot) {
    const std::span<const std::byte> record = cache_slot(layout, file, slot);
    const auto window = load<std::uint64_t>(record.data());
    const bool good = window <= static_cast<std::uint64_t>(std::numeric_limits<int64_t>::max()) &&
                      (!verify || record_is_whole(layout, record));
    // A second record of a window is as good as the first, and its place can be used again.
    if (!good || !index.slots.emplace(static_cast<int64_t>(window), slot).second) {
      index.damaged.push_back(slot);
    }
  }
  return index;
}

}  // namespace qat::train
