#pragma once

// The whole of libqat except `qat/models/` (link qat::models and include qat/models/load.hpp for that).

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/core/scheme.hpp"
#include "qat/eval/bootstrap.hpp"
#include "qat/eval/choices.hpp"
#include "qat/eval/eval.hpp"
#include "qat/export/export.hpp"
#include "qat/export/requantization.hpp"
#include "qat/grid/grid.hpp"
#include "qat/nn/embedding.hpp"
#include "qat/nn/linear.hpp"
#include "qat/ops/ops.hpp"
#include "qat/policy/policy.hpp"
#include "qat/prepare/batch_norm.hpp"
#include "qat/prepare/prepare.hpp"
#include "qat/prepare/state.hpp"
#include "qat/quantizer/quantizer.hpp"
#include "qat/train/token_data.hpp"
#include "qat/train/trainer.hpp"
#include "qat/version.hpp"
