"""The server: runs as models behind OpenAI's HTTP interface.

    names        which model names there are, and which there cannot be
    requests     what a client may send: every field known, every number bounded on both sides
    limits       how much of everything one server takes
    engine       what the HTTP side asks of whoever computes answers
    turns        whose requests are computed next
    batching     the engine: one model in memory, one thread that computes
    continuous   transformers' continuous batching, where it agrees with the model's own answers
    by_request   its attention on a CPU: each request over its own keys
    threads      how many compute on a CPU
    replies      what a client is answered, as JSON and as server-sent events
    guards       what is refused before a request is read: keys, hosts, sizes
    metrics      counters as Prometheus reads them
    app          the routes

Owns HTTP and who waits for whom. Prompts are `data.encode`'s, the same as in training and chat;
sampling is transformers'. The command line is `cli.serve`'s. No file is opened and no address is
contacted because of what a request says.
"""
