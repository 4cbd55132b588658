"""The tables that the project is judged by, made from a bank's rows: what was forecast, what was
measured, beside every baseline, as Markdown with figures."""
