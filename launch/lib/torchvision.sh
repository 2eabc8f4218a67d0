# shellcheck shell=bash disable=SC2154
# Sourced by setup.sh: makes `import torchvision` work for every program of the environment. torchvision for CUDA lacks
# its operators next to a CPU build of torch. Needs ROOT, and venv_python, the Python of the environment.

# complete_torchvision TORCH: if torchvision cannot be imported with this version of torch, install the wheel for the same
# build, or else define the missing operators.
complete_torchvision() {
  if imports_torchvision; then return; fi
  run_step torchvision_operators "Making torchvision work with torch $1" repair_torchvision "$1"
  imports_torchvision || echo "torchvision cannot be imported; see: $venv_python -c 'import torchvision'"
}

imports_torchvision() { "$venv_python" -I -c 'import torchvision' >/dev/null 2>&1; }

repair_torchvision() {
  local release
  release=$("$venv_python" -I -c 'from importlib.metadata import version; print(version("torchvision").partition("+")[0])')
  if [[ $1 == *+* ]] && "$venv_python" -m pip install --no-deps --force-reinstall "torchvision==$release+${1#*+}"; then
    if imports_torchvision; then return; fi
  fi
  define_torchvision_operators
}

# define_torchvision_operators: a .pth file is read whenever Python starts. The module comes first, because a .pth file
# without its module prints an error each time.
define_torchvision_operators() {
  local folder
  folder=$("$venv_python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp "$ROOT/hvd_adam/models/torchvision_operators.py" "$folder/hvd_adam_torchvision.py"
  echo 'import hvd_adam_torchvision; hvd_adam_torchvision.install()' >"$folder/hvd_adam_torchvision.pth"
}
