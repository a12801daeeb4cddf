"""The ruler, the record, inspection of saved files, paired tests, benchmark, roofline, seeds."""
