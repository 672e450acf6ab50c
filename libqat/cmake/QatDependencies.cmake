# Finds what libqat builds on. A system package is taken first; otherwise the copy that pip put into the Python
# environment: torch, nlohmann-json, pybind11 and Catch2 all come as wheels, so no root and no download is needed.
# Only the extension needs Python itself.

if(QAT_BUILD_PYTHON)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
else()
  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
endif()
if(Python_Interpreter_FOUND)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    OUTPUT_VARIABLE QAT_SITE_PACKAGES OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(QAT_TORCH_HINTS "${QAT_SITE_PACKAGES}/torch/share/cmake")
endif()

include(qatTorch)
if(NOT Torch_FOUND)
  message(FATAL_ERROR "${QAT_TORCH_NOT_FOUND}")
endif()

# at::parallel_for is inline code: compiled without OpenMP it silently runs on one thread. The runtime is the libgomp
# that LibTorch has loaded already (same soname).
find_package(OpenMP REQUIRED COMPONENTS CXX)
# By flag and not by the library's path, which CMake would weigh against the copy in LibTorch's own folder.
add_library(qat::openmp INTERFACE IMPORTED)
target_compile_options(qat::openmp INTERFACE ${OpenMP_CXX_FLAGS})
target_link_options(qat::openmp INTERFACE ${OpenMP_CXX_FLAGS})

if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json 3.11 QUIET)
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_path(QAT_JSON_INCLUDE nlohmann/json.hpp
    HINTS "${QAT_SITE_PACKAGES}/nlohmann_json/include" REQUIRED)
  add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)
  target_include_directories(nlohmann_json::nlohmann_json SYSTEM INTERFACE "${QAT_JSON_INCLUDE}")
endif()

if(QAT_BUILD_PYTHON)
  find_package(pybind11 3.0 CONFIG REQUIRED HINTS "${QAT_SITE_PACKAGES}/pybind11/share/cmake")
endif()

if(QAT_BUILD_TESTS)
  find_path(QAT_CATCH2_INCLUDE catch2/catch.hpp
    HINTS "${QAT_SITE_PACKAGES}/catch2/install/include" REQUIRED)
endif()
