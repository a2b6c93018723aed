// What the shared library shows to the Python module.
#pragma once

#define SEQKERNELS_API __attribute__((visibility("default")))
