#!/usr/bin/env bash
# An environment in which salesforce-lavis 1.0.2 runs:  lavis.sh FOLDER BASE
#
# BASE is an environment with torch and torchvision (CPython 3.11 or older, for tokenizers 0.13 has no later wheels); FOLDER
# borrows both, with what they need, by links, and installs the rest in the versions that LAVIS wants. Nothing else of BASE
# is seen. Does nothing where FOLDER is ready already.
set -euo pipefail
folder=${1:?usage: lavis.sh FOLDER BASE}
base=${2:?usage: lavis.sh FOLDER BASE}
here=$(cd "$(dirname "$0")" && pwd)
ready="$folder/.ready"
[ -e "$ready" ] && [ ! "$here/lavis.sh" -nt "$ready" ] && [ ! "$here/borrow.py" -nt "$ready" ] && exit 0

"$base/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))' ||
  { echo "lavis.sh: $base has $("$base/bin/python" -V); LAVIS needs CPython 3.11 or older" >&2; exit 1; }
rm -rf "$folder"
"$base/bin/python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip install -q --disable-pip-version-check "$@"; }
"$base/bin/python" "$here/borrow.py" "$folder" torch torchvision

pip "setuptools<81" wheel "numpy<2" "pandas<2.3" pillow packaging safetensors "transformers==4.26.1" "tokenizers==0.13.3" \
  "huggingface-hub<1" omegaconf iopath decord webdataset einops ftfy sentencepiece
# Their own requirements ask for builds that no longer exist, or for torch again.
pip --no-deps "salesforce-lavis==1.0.2" "timm==0.4.12" "opencv-python-headless==4.5.5.64"
pip --no-deps --no-build-isolation "fairscale==0.4.4"

# `import lavis` imports these, BLIP-2 never calls them.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/spacy" "$site/pycocotools" "$site/pycocoevalcap"
touch "$site/spacy/__init__.py" "$site/pycocotools/__init__.py" "$site/pycocoevalcap/__init__.py"
echo "COCO = None" > "$site/pycocotools/coco.py"
echo "COCOEvalCap = None" > "$site/pycocoevalcap/eval.py"
"$folder/bin/python" -W ignore -c "from lavis.models.blip2_models.blip2_qformer import Blip2Qformer"
touch "$ready"
