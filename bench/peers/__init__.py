"""The same workloads on Rowlock and on what people would pick instead: `python -m bench.peers`."""
