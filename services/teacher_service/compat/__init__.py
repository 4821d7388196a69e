"""Other servers' wire formats, a file each, on the same engine, queue and store as `POST /v1/targets`.

`completions.py` is vLLM's `/v1/completions`: read it first. `sglang_generate.py` is SGLang's `/generate`,
`token_generate.py` vLLM's `/inference/v1/generate`. Imports the rest of the service; `app.py` alone imports it.
"""
