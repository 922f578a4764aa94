"""Load generator, sweep and reports of `blinkimp bench`. Definitions of every figure: blinkimp/bench/BENCH.md."""
