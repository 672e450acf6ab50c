#pragma once

// The exceptions of libqat. Every message reads "function: subject: expected ..., got ...", so that it
// names what was called, which tensor, file or JSON path is meant, and what would have been right.

#include <stdexcept>
#include <string>

namespace qat {

/// Base of everything libqat throws on purpose. In Python: `libqat.Error`.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A bad argument, policy or configuration: the caller can mend it. In Python also a `ValueError`.
class ArgumentError : public Error {
 public:
  using Error::Error;
};

/// A file that is missing, unreadable, truncated, malformed, or that cannot be written.
/// In Python also an `OSError`.
class FileError : public Error {
 public:
  using Error::Error;
};

/// Legal input that libqat (or the file format asked for) cannot represent. In Python also a
/// `NotImplementedError`.
class UnsupportedError : public Error {
 public:
  using Error::Error;
};

/// A value that has no place on a grid: NaN, infinity, or a scale beyond its stored type.
/// In Python also an `ArithmeticError`.
class NumericError : public Error {
 public:
  using Error::Error;
};

}  // namespace qat
