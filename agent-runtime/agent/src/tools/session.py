def _serve():
    import ast, builtins, json, linecache, os, sys, traceback
    orders = os.fdopen(os.dup(0), "r", encoding="utf-8")
    status = os.dup(9)
    os.close(9)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    names = sys.modules["__main__"].__dict__
    del names["_serve"]
    count = 0
    for line in orders:
        count += 1
        name = "<cell %d>" % count
        code = json.loads(line)
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        failed = 0
        try:
            tree = ast.parse(code, name)
            last = None
            if tree.body and isinstance(tree.body[-1], ast.Expr):
                last = ast.Expression(tree.body.pop().value)
            exec(compile(tree, name, "exec"), names)
            if last is not None:
                value = eval(compile(last, name, "eval"), names)
                if value is not None:
                    builtins._ = value
                    print(repr(value))
        except BaseException as error:
            failed = 1
            where = error.__traceback__ and error.__traceback__.tb_next
            if isinstance(error, SyntaxError) and error.filename == name:
                where = None
            traceback.print_exception(type(error), error, where)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass
        os.write(status, b"%d\n" % failed)


_serve()
