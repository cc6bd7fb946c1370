"""OpenAI's interface in front of a model with memories. Needs the extra `serve`.

requests.py    what is asked, checked; errors as the interface has them
line.py        one thread that runs the model, and what waits for it
memories.py    shared memories in folders, and private ones that end
writing.py     from a request to text, and what it read
answers.py     what is answered, as the interface has it
app.py         routes, keys, limits, metrics; page.html is the page at /
"""
