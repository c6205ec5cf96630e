#!/usr/bin/env bash
# The King James Bible, one verse a line, from Debian's package bible-kjv-text, to FILE (default: runs/data/kjv.txt).
#
#   launch/kjv.sh [FILE]
set -euo pipefail
file=${1:-runs/data/kjv.txt} archive=${BIBLE_DATA:-/usr/lib/bible.data}
if [ ! -f "$archive" ]; then
    echo "kjv.sh: $archive: no such file; apt-get install bible-kjv-text" >&2
    exit 2
fi
mkdir -p "$(dirname "$file")"
# After an index comes what compress(1) made. Of its lines, the first is a title, and the first word names the verse.
start=$(LC_ALL=C grep -abom1 $'\x1f\x9d\x90' "$archive" | head -n 1 | cut -d : -f 1)
tail -c +$((start + 1)) "$archive" | gzip -dc | sed -e 1d -e 's/^[^ ]* //' > "$file.part"
mv "$file.part" "$file"
echo "$file: $(wc -l < "$file") verses"
