"""Other servers' wire formats, one file each, on the same engine, queue and store as `POST /v1/targets`.

`completions.py` is vLLM's `/v1/completions`: read it first. `sglang_generate.py` is SGLang's `/generate`,
`token_generate.py` vLLM's `/inference/v1/generate`. Imports the rest of the service; imported by `app.py` and, for the
tables of fields, by `openapi.py`.
"""
