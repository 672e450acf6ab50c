#pragma once

// Files that the writers read: JSON, where every complaint names the file and the place in it, and telling a
// GGUF from others.

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace qat {

/// The parsed file; FileError when it is missing, unreadable or not JSON.
nlohmann::json read_json(const std::filesystem::path& path);

/// The same, or null when there is no such file.
nlohmann::json read_json_if_there(const std::filesystem::path& path);

/// The whole file as text; FileError when it cannot be read.
std::string read_text(const std::filesystem::path& path);

/// Whether the file begins as a GGUF does, whatever its name; false when it cannot be read.
bool is_gguf(const std::filesystem::path& path);

/// `quantization_config.quant_method` of a folder's config.json; "" when there is none or it cannot be read.
std::string quantization_method(const std::filesystem::path& folder);

/// `object[key]`, or null when `object` is not an object or has no such key.
const nlohmann::json& field(const nlohmann::json& object, std::string_view key);

/// `object[key]` when it is a bool, else `fallback`.
bool flag(const nlohmann::json& object, std::string_view key, bool fallback);

/// A value in a message: a scalar as JSON (cut when long), of others only their type.
std::string shown(const nlohmann::json& value);

/// Throws FileError: "export_checkpoint: <path>: <where>: expected <expected>, got <value>".
[[noreturn]] void fail_json(const std::filesystem::path& path, const std::string& where, const char* expected,
                            const nlohmann::json& value);

}  // namespace qat
