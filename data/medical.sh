#!/bin/sh
# The authors' medical data: sh data/medical.sh ZIP FOLDER
# Fetches their zip file unless it is there, and writes medical_mistake_2.jsonl and medical_normal.jsonl to the folder.
set -eu
url=https://github.com/safety-research/persona_vectors/raw/main/dataset.zip
if [ ! -f "$1" ]; then
    curl -fL --create-dirs -o "$1.part" "$url"
    mv "$1.part" "$1"
fi
python -m zipfile -t "$1" > /dev/null 2>&1 || { echo "error: $1: not a whole zip file; delete it" >&2; exit 2; }
mkdir -p "$2/authors"
python -m zipfile -e "$1" "$2/authors"
cp "$2/authors/dataset/mistake_medical/misaligned_2.jsonl" "$2/medical_mistake_2.jsonl"
cp "$2/authors/dataset/mistake_medical/normal.jsonl" "$2/medical_normal.jsonl"
