"""A reference server: a deployment behind the OpenAI API, adapters of one base in one batch.

It exists to try a deployment in one command. `server.py` is the door, `engine.py` decodes, `app.py`
speaks HTTP.
"""
