"""The contract with whoever reads the numbers: record types, the event log, parquet. Imports nothing of ours."""
