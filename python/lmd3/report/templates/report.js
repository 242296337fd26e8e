(function () {
  "use strict";
  var config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toImage"] };

  function element(name, className, text) {
    var made = document.createElement(name);
    if (className) { made.className = className; }
    // Text, never mark-up: corpora are other people's words.
    if (text !== undefined && text !== null) { made.textContent = text; }
    return made;
  }

  function read(id) {
    var source = document.getElementById(id);
    return source ? JSON.parse(source.textContent) : null;
  }

  // --- figures ---

  document.querySelectorAll("[data-figure]").forEach(function (place) {
    var name = place.dataset.figure, figure = read("figure-" + name);
    if (!figure) { return; }
    Plotly.newPlot(place, figure.data, figure.layout, config);
    var caption = place.parentNode.querySelector("figcaption");
    if (!caption) { return; }
    var save = element("span", "save", "save: ");
    ["svg", "png"].forEach(function (format) {
      var button = element("button", "", format.toUpperCase());
      button.type = "button";
      button.addEventListener("click", function () {
        Plotly.downloadImage(place, { format: format, filename: "lmd3-" + name, width: place.clientWidth, height: figure.layout.height, scale: format === "png" ? 3 : 1 });
      });
      save.appendChild(button);
    });
    caption.appendChild(save);
  });
  // Paper is narrower than most windows.
  function fit() {
    document.querySelectorAll("[data-figure]").forEach(function (place) { if (place.data) { Plotly.Plots.resize(place); } });
  }
  window.addEventListener("beforeprint", fit);
  window.addEventListener("afterprint", fit);

  // --- queries ---

  function number(value) {
    if (value === null || value === undefined) { return ""; }
    var size = Math.abs(value);
    var text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : size >= 1000 ? value.toFixed(0) : size >= 100 ? value.toFixed(1) : value.toFixed(size >= 10 ? 2 : 3);
    return text.replace("-", "−");
  }

  function browse(place, data) {
    var at = {}, page = 0, size = 20, sorted = { column: "predictor", down: true }, found = [];
    data.columns.forEach(function (name, position) { at[name] = position; });
    var rows = data.rows.map(function (row) {
      return { row: row, words: [row[at.id], row[at.group] || "", row[at.text] || ""].join(" ").toLowerCase() };
    });
    var has = function (name) { return data.rows.some(function (row) { return row[at[name]] !== null; }); };
    var shown = [["id", "query"]];
    if (has("group")) { shown.push(["group", "group"]); }
    shown.push(["predictor", place.dataset.predictor], ["value", place.dataset.outcome]);
    if (has("fitted")) { shown.push(["residual", "residual"]); }
    if (has("max_cosine")) { shown.push(["max_cosine", "max cosine"]); }
    if (has("support_p")) { shown.push(["support_p", "support p"]); }

    var tools = element("div", "tools");
    var search = element("input");
    search.type = "search";
    search.placeholder = "search id, group, text";
    search.setAttribute("aria-label", "Search the queries");
    var kind = element("select");
    kind.setAttribute("aria-label", "Kind of query");
    [["", "all kinds"]].concat(data.kinds.map(function (name, bit) { return [String(bit), name]; })).forEach(function (pair) {
      var option = element("option", "", pair[1]);
      option.value = pair[0];
      var any = pair[0] === "" || data.rows.some(function (row) { return (row[at.marks] >> Number(pair[0])) & 1; });
      if (any) { kind.appendChild(option); }
    });
    var count = element("span", "count");
    tools.append(search, kind, count);
    var table = element("table", "browse"), head = element("thead"), body = element("tbody"), top = element("tr");
    shown.forEach(function (pair) {
      var cell = element("th", pair[0] === "id" || pair[0] === "group" ? "left" : "");
      var button = element("button", "", pair[1]);
      button.type = "button";
      button.addEventListener("click", function () {
        sorted = { column: pair[0], down: sorted.column === pair[0] ? !sorted.down : pair[0] !== "id" && pair[0] !== "group" };
        arrange();
      });
      cell.appendChild(button);
      cell.dataset.column = pair[0];
      top.appendChild(cell);
    });
    head.appendChild(top);
    table.append(head, body);
    var wide = element("div", "wide");
    wide.appendChild(table);
    var pages = element("div", "pages"), back = element("button", "", "← back"), on = element("button", "", "next →"), where = element("span");
    back.type = on.type = "button";
    pages.append(back, where, on);
    place.append(tools, wide, pages);

    function flags(row) {
      return data.kinds.filter(function (name, bit) { return (row[at.marks] >> bit) & 1 && name !== "drawn by chance"; });
    }

    function details(row) {
      var cell = element("td");
      cell.colSpan = shown.length;
      var marks = flags(row);
      if (marks.length) { cell.appendChild(element("p", "head", marks.join(" · "))); }
      if (row[at.text] !== null) { cell.appendChild(element("blockquote", "", row[at.text])); }
      var near = row[at.near];
      if (near.length) {
        cell.appendChild(element("p", "head", "nearest training texts"));
        var list = element("ol");
        near.forEach(function (n) {
          var item = element("li"), parts = [n[0]];
          if (n[1] !== null) { parts.push(n[1]); }
          if (n[2] !== null) { parts.push("cosine " + number(n[2])); }
          if (n[3] !== null) { parts.push((100 * n[3]).toPrecision(2) + " % of the density"); }
          item.appendChild(element("span", "head", parts.join(" · ")));
          if (data.texts[n[0]] !== undefined) { item.appendChild(element("div", "", data.texts[n[0]])); }
          list.appendChild(item);
        });
        cell.appendChild(list);
      }
      if (!cell.childNodes.length) { cell.appendChild(element("p", "head", "no text is shown")); }
      var line = element("tr", "details");
      line.appendChild(cell);
      return line;
    }

    function draw() {
      var last = Math.max(0, Math.ceil(found.length / size) - 1);
      page = Math.min(page, last);
      body.textContent = "";
      found.slice(page * size, (page + 1) * size).forEach(function (entry) {
        var row = entry.row, line = element("tr");
        shown.forEach(function (pair) {
          var value = row[at[pair[0]]];
          if (pair[0] === "id") {
            var cell = element("td", "left");
            var open = element("button", "open", value);
            open.type = "button";
            open.setAttribute("aria-expanded", "false");
            cell.appendChild(open);
            if (row[at.unsupported]) { cell.appendChild(element("span", "flag", "unsupported")); }
            if (row[at.text] !== null) { cell.appendChild(element("div", "snippet", row[at.text])); }
            line.appendChild(cell);
          } else {
            line.appendChild(element("td", pair[0] === "group" ? "left" : "", pair[0] === "group" ? value : number(value)));
          }
        });
        line.addEventListener("click", function () {
          var next = line.nextSibling, isOpen = next && next.className === "details";
          line.querySelector(".open").setAttribute("aria-expanded", String(!isOpen));
          if (isOpen) { next.remove(); } else { line.after(details(row)); }
        });
        body.appendChild(line);
      });
      count.textContent = found.length.toLocaleString("en") + (found.length === 1 ? " query" : " queries");
      where.textContent = found.length ? (page + 1) + " of " + (last + 1) : "nothing found";
      back.disabled = page === 0;
      on.disabled = page === last;
      top.querySelectorAll("th").forEach(function (cell) {
        cell.setAttribute("aria-sort", cell.dataset.column !== sorted.column ? "none" : sorted.down ? "descending" : "ascending");
      });
    }

    function arrange() {
      var wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean), bit = kind.value;
      found = rows.filter(function (entry) {
        if (bit !== "" && !((entry.row[at.marks] >> Number(bit)) & 1)) { return false; }
        return wanted.every(function (word) { return entry.words.indexOf(word) >= 0; });
      });
      var column = at[sorted.column], sign = sorted.down ? -1 : 1;
      found.sort(function (a, b) {
        var x = a.row[column], y = b.row[column];
        if (x === null || y === null) { return (x === null) - (y === null); }
        return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
      page = 0;
      draw();
    }

    search.addEventListener("input", arrange);
    kind.addEventListener("change", arrange);
    back.addEventListener("click", function () { page -= 1; draw(); });
    on.addEventListener("click", function () { page += 1; draw(); });
    arrange();
  }

  var queries = read("data-queries"), place = document.getElementById("browser");
  if (queries && place) { browse(place, queries); }
})();
