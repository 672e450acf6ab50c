# LibTorch as qat::torch, and Torch_FOUND. Part of the build, and of the installed package: qatConfig.cmake includes
# it, so the package holds no path of the machine that built it. Looked for first where the user says
# (Torch_DIR, CMAKE_PREFIX_PATH), then in QAT_TORCH_HINTS, then beside the Python interpreter.

find_package(Torch QUIET HINTS ${QAT_TORCH_HINTS})
if(NOT Torch_FOUND)
  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
      OUTPUT_VARIABLE QAT_PYTHON_PACKAGES OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_package(Torch QUIET HINTS "${QAT_PYTHON_PACKAGES}/torch/share/cmake")
  endif()
endif()

if(Torch_FOUND AND NOT TARGET qat::torch)
  # An imported target, so its headers are system headers: their warnings are not the user's.
  add_library(qat::torch INTERFACE IMPORTED)
  target_link_libraries(qat::torch INTERFACE ${TORCH_LIBRARIES})
  target_include_directories(qat::torch INTERFACE ${TORCH_INCLUDE_DIRS})
  separate_arguments(QAT_TORCH_FLAGS UNIX_COMMAND "${TORCH_CXX_FLAGS}")
  target_compile_options(qat::torch INTERFACE ${QAT_TORCH_FLAGS})
endif()

set(QAT_TORCH_NOT_FOUND "LibTorch was not found. When torch is a pip package, configure with \
-DCMAKE_PREFIX_PATH=\"$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')\"; when it is an unpacked \
libtorch, with -DCMAKE_PREFIX_PATH=/path/to/libtorch")
