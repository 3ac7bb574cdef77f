"""Routing analysis, one way: forwards → record (Parquet) → statistics → figures: `moe_adapter.analysis`."""

if __name__ == "analysis":
    raise ImportError("import moe_adapter.analysis, not the folder: run `pip install -e .` first")
