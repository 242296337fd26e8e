(function () {
  "use strict";
  var config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], toImageButtonOptions: { format: "svg" } };
  document.querySelectorAll("[data-figure]").forEach(function (place) {
    var source = document.getElementById("figure-" + place.dataset.figure);
    if (!source) { return; }
    var figure = JSON.parse(source.textContent);
    Plotly.newPlot(place, figure.data, figure.layout, config);
  });
  // Paper is narrower than most windows.
  var fit = function () { document.querySelectorAll("[data-figure]").forEach(function (p) { if (p.data) { Plotly.Plots.resize(p); } }); };
  window.addEventListener("beforeprint", fit);
  window.addEventListener("afterprint", fit);
})();
