"""Training methods, one file and one registry row each: which rows they take, what they make of them, their loss.

A method's name is tested nowhere else; loops, optimisers and files live in training/ and runs/.
"""
