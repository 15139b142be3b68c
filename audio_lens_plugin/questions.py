class QuestionSet:
    pass
