#pragma once

// The tables. A new family is one more file and one more line here and in family.cpp.

#include "qat/arch/family.hpp"

namespace qat::arch {

const Family& gemma3();
const Family& gemma4();
const Family& llama();
const Family& qwen2();
const Family& qwen3();

}  // namespace qat::arch
