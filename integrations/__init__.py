"""One file per library, each importable only where that library is: `moe_adapter.integrations`."""

if __name__ == "integrations":
    raise ImportError("import moe_adapter.integrations, not the folder: run `pip install -e .` first")
