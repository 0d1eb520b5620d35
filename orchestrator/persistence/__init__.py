"""The files of a study: its folder, ledger, records and lock."""
