#!/usr/bin/env bash
# Prints the newest Python here that the newest JAX supports and that works: pyenv has a python3.13 in
# PATH that only says that it is not chosen. Prints nothing where there is none.
for version in 3.13 3.12; do
  for python in $(type -ap "python$version") "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if "$python" -c 'import ensurepip, venv' 2> /dev/null; then
      echo "$python"
      exit
    fi
  done
done
