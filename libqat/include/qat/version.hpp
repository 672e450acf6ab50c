#pragma once

// The version of libqat. These three numbers are its one place: CMake's project, the wheel and
// `libqat.__version__` read them here. Versions 0.x are compatible within one minor version.

/// Rises with incompatible changes.
#define QAT_VERSION_MAJOR 0
/// Rises with new features; while the major version is 0, with incompatible changes too.
#define QAT_VERSION_MINOR 1
/// Rises with repairs.
#define QAT_VERSION_PATCH 0

#define QAT_TEXT_(x) #x
#define QAT_DOTTED_(major, minor, patch) QAT_TEXT_(major) "." QAT_TEXT_(minor) "." QAT_TEXT_(patch)
/// "major.minor.patch" of the headers.
#define QAT_VERSION QAT_DOTTED_(QAT_VERSION_MAJOR, QAT_VERSION_MINOR, QAT_VERSION_PATCH)

namespace qat {

/// "major.minor.patch" of the library that this process has loaded. It differs from QAT_VERSION when a
/// program runs with another libqat.so than it was compiled for.
const char* version() noexcept;

}  // namespace qat
