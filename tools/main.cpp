#include "tools/cli.h"

int main(int argc, char** argv) { return bbb::tools::run(argc, argv); }
