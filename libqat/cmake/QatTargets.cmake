# What every compiled target of the project shares.

# qat_configure(<target>): language level, warnings, and the floating-point contract of the grids.
function(qat_configure target)
  target_compile_features(${target} PRIVATE cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON)
  # A fused x*id + 8.5 moves ties to another code than ggml's, so the compiler must not contract.
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wshadow -Wnon-virtual-dtor -ffp-contract=off)
  # GCC 12 warns falsely of overlapping copies in `"text" + std::string` (GCC bug 105651, gone in 13).
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    target_compile_options(${target} PRIVATE -Wno-restrict)
  endif()
  if(QAT_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(QAT_SANITIZE)
    # LibTorch comes without the type information that UBSan's vptr check asks for.
    target_compile_options(${target} PRIVATE -fsanitize=${QAT_SANITIZE} -fno-sanitize=vptr
                                             -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${QAT_SANITIZE})
  endif()
endfunction()

# qat_add_test(<name> SOURCES a.cpp ... [LIBRARIES lib ...]): one Catch2 program, registered with ctest.
function(qat_add_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBRARIES" ${ARGN})
  add_executable(test_${name} ${ARG_SOURCES})
  qat_configure(test_${name})
  target_include_directories(test_${name} PRIVATE "${PROJECT_SOURCE_DIR}/tests/cpp")
  target_link_libraries(test_${name} PRIVATE qat::qat qat_catch_main ${ARG_LIBRARIES})
  add_test(NAME cpp.${name} COMMAND test_${name})
endfunction()
