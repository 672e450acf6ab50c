#include "qat/core/scheme.hpp"

#include "catch.hpp"
#include "qat/core/error.hpp"

TEST_CASE("names and kinds are each other's reverse") {
  for (const char* name : {"ste", "clipped_ste", "trust_mask", "stable_qat"})
    REQUIRE(qat::to_string(qat::estimator_kind(name)) == name);
  for (const char* name : {"reference", "search", "differentiated", "learned", "seq"})
    REQUIRE(qat::to_string(qat::scale_rule(name)) == name);
  for (const char* name : {"lsq", "tensor", "plain"})
    REQUIRE(qat::to_string(qat::scale_gradient(name)) == name);
  for (const char* name : {"linear", "embedding", "conv", "other"}) {
    REQUIRE(qat::to_string(qat::slot_kind(name)) == name);
  }
}

TEST_CASE("an unknown name is refused with the legal ones") {
  REQUIRE_THROWS_AS(qat::estimator_kind("lsqq"), qat::ArgumentError);
  REQUIRE_THROWS_WITH(qat::estimator_kind("lsqq"),
                      "estimator: expected one of ste, clipped_ste, trust_mask, stable_qat, got \"lsqq\"");
  REQUIRE_THROWS_AS(qat::slot_kind(""), qat::ArgumentError);
}
