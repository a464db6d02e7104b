"""What every chapter shares: the gold reference, the error rule, HBM/SRAM accounting, grading, benchmark and plots."""
