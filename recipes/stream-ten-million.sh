#!/bin/sh
# Ten million tokens overnight (LM-Infinite, constant memory): sh recipes/stream-ten-million.sh MODEL TEXT OUT [OPTIONS]
# Goes on where it stopped, whatever stopped it; OUT/curve.json and OUT/curve.svg come at the end.
model=$1 text=$2 out=$3
shift 3
while :; do
    memlm stream "$model" "$text" --tokens 10000000 --window 512 --sinks 10 --out "$out" \
        --save "$out/curve.json" --plot "$out/curve.svg" "$@"
    code=$?
    case $code in
    0 | 2 | 130) exit $code ;; # done; a mistake in the command; interrupted by hand
    esac
    sleep 5
done
