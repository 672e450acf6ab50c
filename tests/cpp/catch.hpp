#pragma once

// The one way to include Catch2: after every torch header, because c10 defines CHECK too.

#ifdef CHECK
#undef CHECK
#endif
#include <catch2/catch.hpp>
