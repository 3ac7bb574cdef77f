"""Runnable recipes built on moe-adapter; not part of the installed package."""
