# Every public header compiles alone. One that is the first include of some source has shown it there; the others get
# a source of their own.
file(GLOB_RECURSE public CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}/libqat/include"
     "${PROJECT_SOURCE_DIR}/libqat/include/qat/*.hpp")
file(GLOB_RECURSE sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/libqat/src/*.cpp")

set(shown)
foreach(source IN LISTS sources)
  file(STRINGS "${source}" first REGEX "^#include" LIMIT_COUNT 1)
  if(first MATCHES "\"(qat/[^\"]+)\"")
    list(APPEND shown "${CMAKE_MATCH_1}")
  endif()
endforeach()

list(REMOVE_ITEM public ${shown})
set(alone)
foreach(header IN LISTS public)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/headers/${header}.cpp")
  file(CONFIGURE OUTPUT "${source}" CONTENT "#include \"@header@\"\n")
  list(APPEND alone "${source}")
endforeach()
add_library(qat_headers OBJECT ${alone})
qat_configure(qat_headers)
target_link_libraries(qat_headers PRIVATE qat::qat)
