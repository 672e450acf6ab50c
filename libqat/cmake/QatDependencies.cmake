# Finds what libqat builds on. A system package is taken first; otherwise the copy that pip put into the Python
# environment: torch, nlohmann-json, pybind11 and Catch2 all come as wheels, so no root and no download is needed.

set(QAT_PYTHON_COMPONENTS Interpreter)
if(QAT_BUILD_PYTHON)
  list(APPEND QAT_PYTHON_COMPONENTS Development.Module)
endif()
find_package(Python 3.10 REQUIRED COMPONENTS ${QAT_PYTHON_COMPONENTS})
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
  OUTPUT_VARIABLE QAT_SITE_PACKAGES OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(APPEND CMAKE_PREFIX_PATH "${QAT_SITE_PACKAGES}/torch/share/cmake" "${QAT_SITE_PACKAGES}/pybind11/share/cmake")

find_package(Torch REQUIRED)

# at::parallel_for is inline code: compiled without OpenMP it silently runs on one thread. The runtime is the libgomp
# that LibTorch has loaded already (same soname).
find_package(OpenMP REQUIRED COMPONENTS CXX)

find_package(nlohmann_json 3.11 QUIET)
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_path(QAT_JSON_INCLUDE nlohmann/json.hpp
    HINTS "${QAT_SITE_PACKAGES}/nlohmann_json/include" REQUIRED)
  add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)
  target_include_directories(nlohmann_json::nlohmann_json SYSTEM INTERFACE "${QAT_JSON_INCLUDE}")
endif()

if(QAT_BUILD_PYTHON)
  find_package(pybind11 3.0 CONFIG REQUIRED)
endif()

if(QAT_BUILD_TESTS)
  find_path(QAT_CATCH2_INCLUDE catch2/catch.hpp
    HINTS "${QAT_SITE_PACKAGES}/catch2/install/include" REQUIRED)
endif()
