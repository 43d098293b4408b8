#!/bin/sh
# The stand-in's compiler: a line for each call, one argument after the other.
set -eu
for argument; do printf '%s\n' "$argument"; done >"$ASC_CALL"
while [ "$1" != -o ]; do shift; done
exec c++ -x c++ -fPIC -c /dev/null -o "$2"
