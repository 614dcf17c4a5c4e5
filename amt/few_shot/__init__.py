"""A few-shot classifier of your own pictures: from labelled examples to classes and a verdict on each."""
