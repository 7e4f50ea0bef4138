#!/bin/sh
# fetch-model URL SHA256SUMS FOLDER
# Puts the files that SHA256SUMS names (lines of sha256sum, plain names) from below URL (https, http or file) into FOLDER.
# FOLDER appears only when every file is there and right, with the list in it: whoever finds FOLDER/SHA256SUMS equal to the
# list that he wants need not read the files again. Until then they lie in FOLDER.partial; the next run goes on from there.
# Exit codes: 0 FOLDER is there; 1 it is not; 2 wrong usage.
set -eu
export LC_ALL=C

say() { printf 'fetch-model: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

if [ $# -ne 3 ]; then
  say "usage: fetch-model URL SHA256SUMS FOLDER"
  exit 2
fi
url=${1%/} sums=$2 folder=${3%/}
partial=$folder.partial

[ -r "$sums" ] || die "$sums cannot be read"
if [ -e "$folder" ]; then
  cmp -s "$sums" "$folder/SHA256SUMS" || die "$folder holds something else than $sums names; give the model another folder"
  say "$folder is complete"
  exit 0
fi

# Checked before anything is fetched: two words, the hash and a name that cannot leave the folder.
lines=$(grep -v -e '^#' -e '^[[:space:]]*$' "$sums" || true)
[ -n "$lines" ] || die "$sums names no file; make it with: sha256sum * >SHA256SUMS"
bad=$(printf '%s\n' "$lines" | grep -vnE '^[0-9a-f]{64} [ *][A-Za-z0-9_][A-Za-z0-9_.-]*$' || true)
[ -z "$bad" ] || die "$sums: not a line of sha256sum with a plain name: $bad"
if printf '%s\n' "$lines" | grep -q ' .SHA256SUMS$'; then die "$sums names itself"; fi

right() { [ "$(sha256sum <"$2" | cut -d ' ' -f 1)" = "$1" ]; }

get() { curl -fsS -L --retry 3 --connect-timeout 20 -o "$@"; }

# fetch URL FILE HASH. Goes on where an earlier run stopped, if the server can; what does not become right so is fetched anew.
fetch() {
  if [ -s "$2" ] && get "$2" -C - "$1" && right "$3" "$2"; then return 0; fi
  rm -f "$2"
  get "$2" "$1"
}

mkdir -p "$partial"
printf '%s\n' "$lines" | while read -r hash name; do
  name=${name#\*}
  if [ -f "$partial/$name" ] && right "$hash" "$partial/$name"; then
    say "$name is there"
    continue
  fi
  fetch "$url/$name" "$partial/$name" "$hash" || die "$url/$name could not be fetched"
  if ! right "$hash" "$partial/$name"; then
    rm -f "$partial/$name"
    die "$url/$name is not what $sums says: its SHA-256 differs from $hash"
  fi
  say "$name is right"
done
# Files that an earlier list named.
for file in "$partial"/*; do
  name=${file##*/}
  printf '%s\n' "$lines" | cut -c 67- | grep -qxF -e "$name" || rm -rf "$file"
done
cp "$sums" "$partial/SHA256SUMS"
chmod -R a+rX "$partial"
sync
mv "$partial" "$folder"
say "$folder is complete"
