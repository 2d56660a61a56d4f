"""COURSE.md: its commands, and the diffs that solve its exercises."""
import ast
import difflib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COURSE = (ROOT / 'COURSE.md').read_text(encoding='utf-8')
DIFFS = re.findall(r'```diff\n(.*?)```', COURSE, re.S)

def apply(diff, folder):
    """Apply a diff to a copy of its file. Returns the path of the copy and its new text."""
    name = re.search(r'^\+\+\+ b/(\S+)$', diff, re.M)[1]
    shutil.copy(ROOT / name, folder / name)
    done = subprocess.run(['git', 'apply', '-'], input=diff, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f'{name}: {done.stderr}'
    return folder / name, (folder / name).read_text(encoding='utf-8')

def functions(text, *names):
    """Functions of a script, by name, and the imports that they need."""
    nodes = [node for node in ast.parse(text).body
             if isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, 'name', '') in names]
    space = {}
    exec(compile(ast.Module(nodes, []), 'course', 'exec'), space)
    return space

@pytest.mark.skipif(shutil.which('git') is None, reason='no git')
@pytest.mark.parametrize('diff', DIFFS, ids=[re.search(r'b/(\S+)', diff)[1] for diff in DIFFS])
def test_solutions_apply(diff, tmp_path):
    """Each diff fits today's code, changes only the lines that it says, and gives valid Python."""
    path, new = apply(diff, tmp_path)
    ast.parse(new)
    old = (ROOT / path.name).read_text(encoding='utf-8')
    changed = [line for line in difflib.ndiff(old.split('\n'), new.split('\n')) if line[0] in '+-']
    said = [line for line in diff.split('\n') if re.match(r'[+-](?![+-]{2} )', line)]
    assert sorted(line[0] + line[2:] for line in changed) == sorted(said)

def test_every_exercise_has_a_solution():
    """Lesson 1 has no exercise; each other one has an exercise, answers and a diff."""
    lessons = re.findall(r'^## (\d+)\. ', COURSE, re.M)
    assert lessons == [str(i) for i in range(1, 11)]
    assert re.findall(r'^Lesson (\d+)$', COURSE, re.M) == lessons[1:]
    parts = re.split(r'^## \d+\. ', COURSE.split('# Answers')[0], flags=re.M)[1:]
    for part in parts:
        assert all(word in part for word in ('*Read*', '*Run*', '*Discuss*'))
    assert ['*Exercise*' in part for part in parts] == [False] + 9 * [True]
    answers = COURSE.split('# Answers')[1].split('# ')[0]
    assert re.findall(r'^(\d+)\. \(1\)', answers, re.M) == lessons

def solved(lesson, tmp_path):
    diff = re.search(rf'^Lesson {lesson}\n\n```diff\n(.*?)```', COURSE, re.M | re.S)[1]
    return apply(diff, tmp_path)[1]

@pytest.mark.skipif(shutil.which('git') is None, reason='no git')
def test_what_solutions_do(tmp_path):
    """Lesson 5: the peak for 80% of the steps, then a line to min_lr. Lesson 10: sentences are counted."""
    get_lr = functions(solved(5, tmp_path), 'get_lr')
    get_lr.update(learning_rate=1.0, min_lr=0.1, warmup_iters=0, max_iters=101)
    rates = [get_lr['get_lr'](step) for step in (0, 79, 90, 100)]
    # the fall takes 20.2 steps: at step 90, 10 are left, so 0.1 + 0.9 * 10 / 20.2
    assert rates[0] == rates[1] == 1.0 and rates[3] == pytest.approx(0.1)
    assert rates[2] == pytest.approx(0.1 + 0.9 * 10 / 20.2)

    grade = functions(solved(10, tmp_path), 'grade')['grade']
    assert grade({'max_sentences': 2}, 'It is 3.5 metres. Good!') == (True, 1.0)
    assert grade({'max_sentences': 1}, 'It is 3.5 metres. Good!') == (False, 0.0)
