# Writes OUT, the source file of what `bbb --version` says of this build. It runs with every build,
# but a file that would not change keeps its time. So a new commit compiles one small file.
#   cmake -DSOURCE=.. -DOUT=.. -DCUDA=.. -P build_text.cmake
set(commit unknown)
# A copy without its own repository must not name the commit of one that happens to be around it.
execute_process(COMMAND git -C ${SOURCE} rev-parse --show-toplevel
                OUTPUT_VARIABLE top OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
file(REAL_PATH ${SOURCE} source)
if("${top}" STREQUAL "${source}")
  execute_process(COMMAND git -C ${SOURCE} describe --always --abbrev=10 --exclude=* --dirty=+changes
                  OUTPUT_VARIABLE said OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(said)
    set(commit ${said})
  endif()
endif()
set(text "commit ${commit}, ${CUDA}")
file(CONFIGURE OUTPUT ${OUT} CONTENT [[
namespace bbb::tools {
extern const char* const kBuild;
const char* const kBuild = "@text@";
}  // namespace bbb::tools
]] @ONLY)
