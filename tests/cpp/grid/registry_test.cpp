#include <string>
#include <thread>
#include <utility>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"

using qat::grid::find;

namespace {

const std::vector<std::string> kFirstNames{"f32",   "f16",   "bf16",                    //
                                           "q4_0",  "q4_1",  "q5_0",  "q5_1",  "q8_0",  //
                                           "q2_0",  "q1_0",  "tq1_0", "tq2_0",          //
                                           "mxfp4", "nvfp4",                            //
                                           "q2_k",  "q3_k",  "q4_k",  "q5_k",  "q6_k"};

std::vector<std::string> all_names() {
  std::vector<std::string> names = kFirstNames;
  for (const char* ending : {"", "_asym"}) {
    for (const char* bits : {"int8", "int4", "int3", "int2"}) {
      for (const char* block : {"_tensor", "_channel", "_g32", "_g64", "_g128", "_g256"}) {
        names.push_back(std::string(bits) + block + ending);
      }
    }
  }
  for (const char* bits : {"mlx8", "mlx6", "mlx5", "mlx4", "mlx3", "mlx2"}) {
    for (const char* block : {"_g32", "_g64", "_g128"}) names.push_back(std::string(bits) + block);
  }
  for (const char* bits : {"mobile8", "mobile4", "mobile2"}) {
    names.push_back(bits);
    names.push_back(std::string(bits) + "_g256");
  }
  return names;
}

const std::vector<std::string> kNames = all_names();

}  // namespace

TEST_CASE("grids are listed in a fixed order and found by name") {
  const auto names = qat::grid::names();
  REQUIRE(std::vector<std::string>(names.begin(), names.end()) == kNames);
  for (const std::string_view name : kNames) {
    REQUIRE(find(name).info().name == name);
    REQUIRE(qat::grid::reference(name).info().name == name);
    REQUIRE(&find(name) == &find(name));
  }
}

TEST_CASE("an unknown grid is refused with the legal names") {
  std::string message = "grid: expected one of f32";
  for (size_t i = 1; i < kNames.size(); ++i) message.append(", ").append(kNames[i]);
  REQUIRE_THROWS_AS(find("q4_2"), qat::ArgumentError);
  REQUIRE_THROWS_WITH(find("q4_2"), message + ", got \"q4_2\"");
  REQUIRE_THROWS_AS(find(""), qat::ArgumentError);
  REQUIRE_THROWS_AS(qat::grid::reference("Q4_0"), qat::ArgumentError);
}

TEST_CASE("options stand behind the name, and their defaults are left out of it") {
  REQUIRE(find("int4_g32@bf16:fp16").info().name == "int4_g32@bf16:fp16");
  REQUIRE(find("int4_g32@fp32:fp32").info().name == "int4_g32");
  REQUIRE(&find("int4_g32@fp32:fp32") == &find("int4_g32"));
  REQUIRE(find("int4_g32@fp32:bf16").info().name == "int4_g32:bf16");
  REQUIRE(find("int4_g32:fp32").info().name == "int4_g32");
  REQUIRE(&find("int4_g32@bf16:fp16") == &find("int4_g32@bf16:fp16"));
  REQUIRE(qat::grid::reference("int2_channel@pow2").info().name == "int2_channel@pow2");
  using qat::grid::DType;
  for (const auto& [name, dtype] : {std::pair("int4_g32", DType::kF32),
                                    {"int4_g32@fp16", DType::kF16},
                                    {"int4_g32@bf16", DType::kBF16},
                                    {"int4_g32@bf16_fp16", DType::kF16},
                                    {"int4_g32@pow2", DType::kBF16},
                                    {"int4_g32:bf16", DType::kF32}}) {
    const qat::grid::Info& info = find(name).info();
    REQUIRE(info.name == name);
    REQUIRE(info.bits == 4);
    REQUIRE(info.block == 32);
    REQUIRE(info.fields.size() == 1);
    REQUIRE(info.fields[0].dtype == dtype);
  }
}

TEST_CASE("options that a grid lacks are refused with the legal ones") {
  const std::string scale_grids = "fp32, fp16, bf16, bf16_fp16, pow2";
  REQUIRE_THROWS_WITH(find("int4_g32@f16"),
                      "grid: expected a scale grid (behind \"@\") of int4_g32 that is one of " + scale_grids +
                          ", got \"f16\"");
  REQUIRE_THROWS_WITH(find("int4_g32@"), Catch::EndsWith(scale_grids + ", got \"\""));
  REQUIRE_THROWS_WITH(find("int4_g32@bf16:"),
                      "grid: expected a dequant dtype (behind \":\") of int4_g32 that "
                      "is one of fp32, fp16, bf16, got \"\"");
  for (const char* bad : {"int4_g32@bf16@bf16", "int4_g32:bf16@bf16", "int4_g32:bf16:bf16", "int4_g32 @bf16",
                          "int4_g33@bf16", "q4_0@bf16", "f32:bf16", "@bf16", ":", "@", "int4_g32@BF16"}) {
    REQUIRE_THROWS_AS(find(bad), qat::ArgumentError);
    REQUIRE(qat::grid::bad_name(bad).has_value());
  }
  REQUIRE_THROWS_WITH(find("q4_0@bf16"), Catch::EndsWith("got \"q4_0@bf16\""));
  REQUIRE_FALSE(qat::grid::bad_name("int4_g32@bf16").has_value());
}

TEST_CASE("the options of a name, and a name from options") {
  using qat::grid::name_options;
  REQUIRE(name_options("q4_0").scale_grids.empty());
  REQUIRE(name_options("q4_0").dequant_dtypes.empty());
  REQUIRE(name_options("int4_g32").scale_grids.size() == 5);
  REQUIRE(name_options("int4_g32").dequant_dtypes.size() == 3);
  REQUIRE(name_options("mlx4_g64").scale_grids.size() == 3);
  REQUIRE(name_options("mlx4_g64").dequant_dtypes.size() == 1);  // the scales' dtype is that of the product
  REQUIRE_THROWS_WITH(find("mlx4_g64@pow2"), Catch::Contains("one of fp32, fp16, bf16, got \"pow2\""));
  REQUIRE_THROWS_WITH(find("mlx4_g64:bf16"), Catch::Contains("one of fp32, got \"bf16\""));
  for (const std::string_view name : qat::grid::names()) {
    const auto [scale_grids, dequant_dtypes] = name_options(name);
    for (const std::string_view scale_grid : scale_grids) {
      const std::string spelled = qat::grid::with_options(name, scale_grid, "");
      REQUIRE(find(spelled).info().name == (scale_grid == "fp32" ? name : spelled));
    }
    for (const std::string_view dtype : dequant_dtypes) {
      REQUIRE_FALSE(qat::grid::bad_name(qat::grid::with_options(name, "", dtype)).has_value());
    }
  }
}

TEST_CASE("grids are made once, whichever threads ask first") {
  std::vector<const qat::grid::Grid*> found(8);
  std::vector<std::thread> threads;
  for (auto& slot : found) threads.emplace_back([&slot] { slot = &find("int3_g256@pow2:bf16"); });
  for (std::thread& thread : threads) thread.join();
  for (const qat::grid::Grid* grid : found) REQUIRE(grid == found[0]);
}

TEST_CASE("the name of an integer grid says its width and its group") {
  for (const int bits : {8, 4, 3, 2}) {
    const std::string family = "int" + std::to_string(bits);
    for (const int64_t block : {32, 64, 128, 256}) {
      const qat::grid::Info& info = find(family + "_g" + std::to_string(block)).info();
      REQUIRE(info.bits == bits);
      REQUIRE(info.block == block);
    }
    REQUIRE(find(family + "_channel").info().bits == bits);
    REQUIRE(find(family + "_channel").info().block == qat::grid::kWholeRow);
  }
}

TEST_CASE("codes fit the declared width and an int8") {
  for (const std::string_view name : qat::grid::names()) {
    const qat::grid::Info& info = find(name).info();
    if (info.is_float) continue;
    INFO(name);
    REQUIRE(info.code_max - info.code_min + 1 <= 1 << info.bits);
    REQUIRE(info.code_max - info.code_min + 1 > 1 << (info.bits - 1));
    REQUIRE(info.code_min >= -128);
    REQUIRE(info.code_max <= 127);
  }
}

TEST_CASE("block, blocks and divides") {
  REQUIRE(find("q4_0").block(576) == 32);
  REQUIRE(find("q4_0").blocks(576) == 18);
  REQUIRE(find("int4_g64").block(576) == 64);
  REQUIRE(find("int4_g64").blocks(576) == 9);
  REQUIRE(find("int4_channel").block(577) == 577);
  REQUIRE(find("int4_channel").blocks(577) == 1);
  REQUIRE(find("f16").blocks(577) == 0);
  REQUIRE(find("q4_1").params() == 2);
  REQUIRE(find("q8_0").params() == 1);
  REQUIRE(find("f32").params() == 0);
  REQUIRE(find("q8_0").divides(64));
  REQUIRE_FALSE(find("q8_0").divides(65));
  for (const std::string_view name : qat::grid::names()) {
    REQUIRE_FALSE(find(name).divides(0));
    REQUIRE_FALSE(find(name).divides(-32));
    REQUIRE(find(name).divides(256));  // the longest block
  }
}

TEST_CASE("row_bytes counts ggml's blocks, or packed codes and stored scales") {
  using qat::grid::row_bytes;
  REQUIRE(row_bytes(find("f32"), 10) == 40);
  REQUIRE(row_bytes(find("f16"), 10) == 20);
  REQUIRE(row_bytes(find("bf16"), 10) == 20);
  REQUIRE(row_bytes(find("q4_0"), 64) == 2 * 18);
  REQUIRE(row_bytes(find("q4_1"), 64) == 2 * 20);
  REQUIRE(row_bytes(find("q8_0"), 64) == 2 * 34);
  REQUIRE(row_bytes(find("q2_0"), 128) == 2 * 18);
  REQUIRE(row_bytes(find("tq1_0"), 512) == 2 * 54);
  REQUIRE(row_bytes(find("nvfp4"), 128) == 2 * 36);
  REQUIRE(row_bytes(find("nvfp4"), 16) == 8 + 1);  // no whole block of ggml, but one of MLX
  REQUIRE(row_bytes(find("int8_channel"), 9) == 9 + 4);
  REQUIRE(row_bytes(find("int4_channel"), 9) == 5 + 4);
  REQUIRE(row_bytes(find("int2_channel"), 9) == 3 + 4);
  REQUIRE(row_bytes(find("int3_channel"), 9) == 4 + 4);
  REQUIRE(row_bytes(find("int3_g32"), 64) == 24 + 2 * 4);
  REQUIRE(row_bytes(find("int2_g128"), 256) == 64 + 2 * 4);
}

TEST_CASE("a tensor with one scale: rows hold codes only") {
  const qat::grid::Grid& tensor = find("int4_tensor_asym@bf16");
  REQUIRE(tensor.info().block == qat::grid::kWholeTensor);
  REQUIRE(tensor.scale_rows(7) == 1);
  REQUIRE(find("int4_channel").scale_rows(7) == 7);
  REQUIRE(tensor.blocks(100) == 1);
  REQUIRE(qat::grid::row_bytes(tensor, 9) == 5);
  REQUIRE(qat::grid::tensor_bytes(tensor, 7, 9) == 7 * 5 + 3);  // a bfloat16 scale and an int8 zero point
  REQUIRE(qat::grid::tensor_bytes(find("int4_channel"), 7, 9) == 7 * (5 + 4));
}

TEST_CASE("a status has words for a message") {
  REQUIRE(qat::grid::to_string(qat::grid::Status::kNotFinite) == "is not finite");
  REQUIRE(qat::grid::to_string(qat::grid::Status::kOverflow) ==
          "has a value or scale beyond its stored type");
}
