"""Parts of `benches/scan.py`: the rows it scans, the processes of the peers, and the record."""
