"""The benchmark behind `fastcell bench`: fastcell against its peers, one process per contender.

cases.py       what is timed: a layer, its sizes, inference or training; FLOPs and bytes
problem.py     the numbers of a case: weights, inputs, lengths, the gradient fed to the output
contenders/    one small file per library: how it runs a case
worker.py      the process that holds one contender
processes.py   the other end of the pipe: start, ask, stop, continue, kill
judge.py       results equal within tolerance, or no time is printed
limits.py      what the machine allows: FMA rate and read bandwidth
runner.py      alternating blocks over all rows
ratios.py      medians, ratios, geometric means
table.py, record.py, plot.py   the same run for a terminal, a program and the eye
cli.py         options

Commands of their own, `python -m fastcell_bench.NAME`:

sweep.py, sweep_plot.py    curves over T, B, H and threads, and the roofline
variants.py    fastcell against itself: small weights, recomputation
trees.py       TreeLSTM against loops over nodes and over levels in torch
accuracy.py    errors against float64, fastcell's and torch's
"""
