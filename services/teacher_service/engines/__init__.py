"""The engines that compute targets: vLLM, transformers, and arithmetic for tests, behind one protocol.

May import `serving` and the contract; vLLM is imported only here, and used through its public extension points. Open
`protocol.py` first, then `hf.py`.
"""
