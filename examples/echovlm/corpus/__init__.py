"""The paper's data section: from hospital exports to an instruction corpus, a file a step.

`python -m examples.echovlm.corpus STEP --help` runs one. Each step reads cases or instances and writes those that it
keeps, with a manifest that says what became of the rest.
"""
